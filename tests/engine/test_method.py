"""A published method by name: its data-free preset, and the quantizer that belongs to it."""

import pytest
from mmengine.config import Config

from psaq_mm.commands.common import load_config
from psaq_mm.commands.dfq_train import main as dfq_train
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.config import apply_method, quant_holder, quantized_model_config, to_data_free
from psaq_mm.engine.methods import METHODS
from psaq_mm.engine.presets import resolve_dfq, with_method
from psaq_mm.errors import ConfigError, SpecError
from psaq_mm.quantization import RECIPES, QuantSpec

OWN = dict(
    preset='psaq_v2',
    size=(64, 96),
    batch_size=2,
    iters=77,
    lr=3e-5,
    calibration_samples=5,
    save_samples=True,
    generator=dict(batch_size=4, steps=9),
)


def quantized(**quant):
    return Config(
        dict(model=dict(type='psaq_mm.Quantized', base_type='X', quant=dict(preset='w4a8', scope='full', **quant)))
    )


def test_every_method_has_a_preset_and_a_recipe():
    for name, method in METHODS.items():
        settings = resolve_dfq(name)
        assert settings['method'] == name == method.name and method.description
        assert {method.recipe_for(bits) for bits in (4, 8)} <= set(RECIPES)
        assert bool(settings['iters']) == method.trains


@pytest.mark.parametrize('method', ['psaq_v1', 'repq'])
def test_a_method_that_only_calibrates_keeps_what_is_the_machines(method):
    resolved, plain = resolve_dfq(with_method(OWN, method)), resolve_dfq(method)
    assert (resolved['size'], resolved['batch_size'], resolved['save_samples']) == ((64, 96), 2, True)
    assert resolved['generator']['batch_size'] == 4
    for key in ('iters', 'lr', 'calibration_samples', 'evolve_every', 'samples', 'classes'):
        assert resolved[key] == plain[key], key
    assert resolved['generator']['steps'] == plain['generator']['steps']


def test_a_method_that_trains_takes_the_configs_schedule():
    resolved = resolve_dfq(with_method(OWN, 'repq_v2'))
    assert resolved['method'] == 'repq_v2' and resolved['iters'] == 77 and resolved['generator']['steps'] == 9
    assert resolved['reobserve'] is False


def test_a_preset_by_name_gives_way_to_the_method():
    assert resolve_dfq(with_method('gaussian', 'psaq_v1'))['samples'] == 'generated'
    assert with_method(None, 'repq') == dict(preset='repq')


def test_the_quantizer_of_the_method_at_the_bits_of_the_config():
    model = quantized_model_config(quantized(w_observer='mse'), method='repq')
    assert model.quant == dict(preset='repq_w4a8', scope='full')
    assert QuantSpec.parse(model.quant).reparameterize
    assert quantized_model_config(quantized(), 'w6a6', 'psaq_v1').quant == dict(preset='psaq_v1_w6a6', scope='full')
    assert quantized_model_config(quantized(), 'repq_w6a6', 'psaq_v1').quant.preset == 'repq_w6a6'


@pytest.mark.parametrize('method', ['fast', 'best'])
def test_few_bits_of_activations_take_repqs_quantizer(method):
    assert [METHODS[method].recipe_for(bits) for bits in (8, 6, 4)] == ['psaq_v2', 'repq', 'repq']
    assert quantized_model_config(quantized(), 'w4a4', method).quant.preset == 'repq_w4a4'
    assert quantized_model_config(quantized(), None, method).quant.preset == 'psaq_v2_w4a8'
    assert quantized_model_config(quantized(), 'psaq_v2_w4a4', method).quant.preset == 'psaq_v2_w4a4', (
        'a recipe that is named stays'
    )
    assert METHODS['psaq_v2'].recipe_for(4) == 'psaq_v2'


def test_a_full_precision_config_gets_the_recipe_too():
    plain = Config(dict(model=dict(type='X')))
    assert quantized_model_config(plain, 'w8a8', 'psaq_v1').quant == 'psaq_v1_w8a8'


def test_a_quantized_backbone_keeps_its_quantizer_there():
    config = Config(dict(model=dict(type='X', backbone=dict(type='psaq_mm.QuantSwinTransformer', quant='w8a8'))))
    model = quantized_model_config(config, 'w4a4', 'repq')
    assert quant_holder(model) is model.backbone and model.backbone.quant.preset == 'repq_w4a4'
    assert config.model.backbone.quant == 'w8a8', 'the config stays as it was'


def test_wrong_names():
    with pytest.raises(ConfigError, match="'rep_q' is not known: did you mean repq"):
        with_method(OWN, 'rep_q')
    with pytest.raises(SpecError, match='is no preset'):
        QuantSpec.parse(quantized_model_config(quantized(), 'four', 'repq').quant)


def test_a_preset_takes_the_place_of_all_but_the_scope():
    own = quantized(w_observer='mse')
    assert apply_method(own, 'w8a8').model.quant == dict(preset='w8a8', scope='full')
    assert apply_method(own).model.quant == own.model.quant and own.model.quant.preset == 'w4a8'
    reduced = Config(
        dict(model=dict(type='psaq_mm.Quantized', base_type='X', quant=dict(preset='w8a8', w_reduce_range=True)))
    )
    assert apply_method(reduced, method='psaq_v2').model.quant.w_reduce_range is True, 'it is about the processor'
    assert apply_method(reduced, 'w4a8').model.quant == dict(preset='w4a8', scope='backbone'), 'fewer bits need none'
    target = Config(
        dict(model=dict(type='psaq_mm.Quantized', base_type='X', quant=dict(preset='w8a8', target='tensorrt')))
    )
    assert apply_method(target, 'w4a8', 'fast').model.quant == dict(
        preset='psaq_v2_w4a8', scope='backbone', target='tensorrt'
    ), 'it is about the runtime'
    with pytest.raises(ConfigError, match='full-precision'):
        apply_method(Config(dict(model=dict(type='X'))), method='repq')


def test_options_win_over_the_method(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(f"model = dict(type='psaq_mm.Quantized', base_type='X', quant=dict(preset='w4a8'))\ndfq = {OWN}")
    config = load_config(str(path), {'dfq.generator.steps': 3, 'model.quant.a_observer': 'mse'}, 'w6a6', 'psaq_v1')
    resolved = resolve_dfq(config.dfq)
    assert resolved['generator']['steps'] == 3 and resolved['generator']['rounds'] == 2
    assert QuantSpec.parse(config.model.quant).a_observer == 'mse' and config.model.quant.preset == 'psaq_v1_w6a6'


@pytest.mark.parametrize('twin', ['val', 'test'])
def test_a_training_set_that_is_evaluated_is_refused_before_anything_is_built(tmp_path, twin):
    checkpoint = tmp_path / 'fp.pth'
    checkpoint.touch()
    sets = {
        f'{part}_dataloader': dict(dataset=dict(type='A', data_root=part, ann_file='list.txt'))
        for part in ('train', 'val', 'test')
    }
    config = Config(
        dict(
            model=dict(type='psaq_mm.Quantized', base_type='X'),
            load_from=str(checkpoint),
            **sets,
            dfq=dict(preset='repq', size=(32, 32)),
        )
    )
    assert to_data_free(config).train_cfg.samples == 'real'
    config.train_dataloader.dataset.data_root = twin
    for samples in ('real', ['pink', dict(type='psaq_mm.TrainingImages')]):
        config.dfq.samples = samples
        with pytest.raises(ConfigError, match='the set that is evaluated'):
            to_data_free(config)
    config.dfq.samples = 'generated'
    assert to_data_free(config).train_cfg.samples == 'generated'


MINE = """
from psaq_mm.engine.methods import Method, register_method

register_method(Method('mine', 'Scenes set the ranges.', dict(samples='scenes', calibration_samples=2), trains=False))
"""


def test_a_method_of_ones_own_is_one_registered_object(tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmpretrain')
    from tiny_classifier import ClassifierProject

    project = ClassifierProject(tmp_path, per_class=1)
    path = project.config(size=(32, 32), iters=7, samples='pink')
    path.write_text(path.read_text() + "\ncustom_imports = dict(imports=['my_method'])\n")
    (tmp_path / 'my_method.py').write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert dfq_train([str(path), '--method', 'mine', '--work-dir', str(tmp_path / 'run')]) == 0
        settings = read_checkpoint(tmp_path / 'run' / 'student.pth')['meta']['psaq_mm']['dfq']
        assert (settings['samples'], settings['calibration_samples'], settings['steps']) == ('scenes', 2, 0)
        capsys.readouterr()
        assert dfq_train([str(path), '--method', 'mien', '--work-dir', str(tmp_path / 'wrong')]) == 1
        assert "the method 'mien' is not known: did you mean mine?" in capsys.readouterr().err
    finally:
        METHODS.pop('mine', None)
