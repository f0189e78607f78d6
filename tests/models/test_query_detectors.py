"""The DETR family, MaskFormer and Mask2Former with a Swin backbone: every part behind it is quantized, and runs."""

import copy

import numpy as np
import pytest
import torch
from query_models import CONFIGS, SIZE, build, config_of, library_of, pictures, predicted, samples

from psaq_mm.calibration import Calibration, CalibrationSettings
from psaq_mm.commands.agreement import Agreement, Predictions
from psaq_mm.deploy.parts import graph_parts
from psaq_mm.engine.building import build_model
from psaq_mm.errors import ConfigError, UnsupportedModelError
from psaq_mm.models import TaskModel, quantize_model_, report_of
from psaq_mm.models.tasks import task_of, task_predicting
from psaq_mm.models.tasks.panoptic import matched_pixels
from psaq_mm.models.uncovered import uncovered
from psaq_mm.quantization import calibrate, is_quantizer_key, quantizers, set_mode

pytest.importorskip('mmdet')
pytestmark = pytest.mark.filterwarnings('ignore')
FULL = dict(preset='w8a8', scope='full')

# Parts of each model that stay in floating point, beside attention weights: what names them in a report.
NAMED = dict(
    deformable_detr=('samples the values',),
    two_stage_detr=('samples the values',),
    dino=('samples the values',),
    ddq=('samples the values', 'training alone'),
    grounding_dino=('samples the values', 'queries and words', 'it reads texts'),
    mask2former=('samples the values', 'mask embeddings'),
    maskformer=('mask embeddings',),
    mmseg_mask2former=('samples the values', 'mask embeddings'),
    mmseg_maskformer=('mask embeddings',),
)


@pytest.fixture(scope='module')
def plain():
    """Full-precision models by name, each built once."""
    models = {}

    def get(name):
        pytest.importorskip(library_of(name))
        if name not in models:
            models[name] = build(name)
            try:
                predicted(models[name], name, pictures(1))
            except RuntimeError as error:  # Grounding DINO in a fork of mmdet: sizes of two of its layers differ
                if 'shapes cannot be multiplied' not in str(error):
                    raise
                models[name] = None
        if models[name] is None:
            pytest.skip('this mmdet cannot run the model itself')
        return models[name]

    return get


def quantized(model, quant=FULL, images=None):
    """A copy that is quantized, and calibrated where there are images."""
    model = copy.deepcopy(model)
    quantize_model_(model, quant)
    if images is not None:
        calibrate(model, lambda: TaskModel(model).calibration_forward(images, model.quant_spec.scope))
    return model


def same(found, expected, **tolerance):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, **(tolerance or dict(rtol=0, atol=0)))


@pytest.mark.parametrize('name', list(CONFIGS))
def test_scope_full(name, plain):
    """Off it is the library; calibrated on pictures without labels no quantizer is left, and 8 bits are close; a state
    dict gives the same model again; the report names what is float."""
    model, images = plain(name), pictures()
    student = quantized(model)
    set_mode(student, 'off')
    smaller = [SIZE, (48, 70)]  # the second picture does not fill its batch: keys are masked
    # PyTorch 2.1 divides the queries by the root of a head's width, newer ones multiply by its inverse.
    tolerance = {} if torch.__version__ < '2.2' else dict(rtol=1e-4, atol=1e-4)
    same(predicted(student, name, images, smaller), predicted(model, name, images, smaller), **tolerance)
    set_mode(student, 'on')
    calibrate(student, lambda: TaskModel(student).calibration_forward(images, 'full'))
    assert not [n for n, quantizer in quantizers(student) if not bool(quantizer.calibrated)]

    with torch.no_grad():
        teacher = TaskModel(model, ('head',)).run(images)
        learned = TaskModel(student, ('head',)).run(images, chosen=teacher.chosen)
    assert len(learned.parts) == len(teacher.parts) == 2
    for one, other in zip(learned.parts, teacher.parts):
        assert one.shape == other.shape and other.isfinite().all()
        assert 0 < (one - other).norm() < 0.12 * other.norm()

    again = quantized(model)
    state = student.state_dict()
    assert {k for k in state if not is_quantizer_key(k)} == set(model.state_dict())
    again.load_state_dict(state)
    same(predicted(again.eval(), name, images), predicted(student, name, images))

    reasons = [row.reason for row in report_of(student).floats]
    for expected in NAMED.get(name, ()):
        assert any(expected in reason for reason in reasons), reasons
    attention = [row for row in report_of(student).layers if '.matmul_' in row.name and 'backbone' not in row.name]
    assert len(attention) >= 4 and all(row.a_bits == 8 for row in attention)
    unnamed = {row.operation for row in uncovered(student, SIZE)}
    assert unnamed == set(), 'a product or sampling in floating point that no row names'


@pytest.mark.parametrize(
    'part', ['q.input', 'k.weight', 'v.input', 'out_proj.weight', 'matmul_qk.rhs', 'matmul_av.lhs']
)
def test_each_quantizer_of_cross_attention_matters(part, plain):
    student = quantized(plain('detr'), dict(preset='w4a4', scope='full', quantize_softmax=True), pictures())
    before = predicted(student, 'detr', pictures())
    assert set_mode(student, 'off', f'decoder.layers.0.cross_attn.attn.{part}_quantizer')
    assert any(not torch.equal(a, b) for a, b in zip(predicted(student, 'detr', pictures()), before))


@pytest.mark.parametrize('name', ['two_stage_detr', 'ddq'])
def test_a_student_decodes_the_queries_that_its_teacher_chose(name, plain):
    teacher, images = TaskModel(plain(name), ('head',)), pictures()
    student = TaskModel(quantized(plain(name), dict(preset='w4a4', scope='full'), images), ('head',))
    with torch.no_grad():
        wanted, own = teacher.run(images), student.run(images)
        led = student.run(images, chosen=wanted.chosen)
        same(teacher.run(images, chosen=wanted.chosen).parts, wanted.parts)
    assert any(not torch.equal(a, b) for a, b in zip(own.chosen, wanted.chosen)), 'the choice has to differ'
    assert all(torch.equal(a, b) for a, b in zip(led.chosen, wanted.chosen))
    assert sum(float((a - b).abs().sum()) for a, b in zip(led.parts, wanted.parts)) < sum(
        float((a - b).abs().sum()) for a, b in zip(own.parts, wanted.parts)
    )


@pytest.mark.parametrize('name, layer', [('mask2former', 'attn.q'), ('dab_detr', 'attn.qcontent_proj')])
def test_guided_rounding_weighs_the_rows_of_encoder_and_decoder(name, layer, plain):
    """Its hooks multiply matrices inside of attention whose own products are told by their calls."""
    student = copy.deepcopy(plain(name))
    quantize_model_(student, dict(preset='w4a8', scope='full'))
    view = TaskModel(student, ('backbone', 'head'))
    settings = CalibrationSettings(batch_size=2, calibration_samples=2, rounding='guided')
    calibration = Calibration(view, settings, scope='full')
    calibration.run(pictures())
    rounded = {row.name for row in calibration.rounded if not row.reason}
    assert any('encoder.layers' in row for row in rounded)
    assert any('decoder.layers' in row and row.endswith(layer) for row in rounded)


def test_pictures_with_fewer_places_than_queries_are_refused(plain):
    view = TaskModel(quantized(plain('two_stage_detr')))
    view.model.num_queries = 1000
    set_mode(view.model, 'off')
    with pytest.raises(ConfigError, match=r'give \d+ places, of which DeformableDETR chooses num_queries=1000'):
        view.calibration_forward(pictures(), 'full')


def test_a_language_model_is_asked_for_the_classes_and_learns_nothing(plain):
    model = copy.deepcopy(plain('grounding_dino'))
    model.psaq_mm_classes = ('cat', 'big_dog')
    asked = []
    model.language_model.register_forward_hook(lambda module, inputs, output: asked.append(inputs[0]))
    parts = TaskModel(model, ('head',)).run(pictures(1)).parts
    assert asked == [['cat. big dog. ']]
    assert parts[0].shape[-1] == 5 and parts[0].isfinite().all()  # a word or a dot each
    sum(part.sum() for part in parts).backward()
    assert model.text_feat_map.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.language_model.parameters())


def test_a_language_model_that_is_not_here_is_named():
    """Whether transformers is not installed, or the folder does not exist."""
    config = config_of('grounding_dino').model
    config.language_model = dict(type='BertModel', name='/nowhere/bert')
    for model in (config, dict(config, type='psaq_mm.Quantized', base_type=config.type, quant='w8a8')):
        with pytest.raises(ConfigError, match='/nowhere/bert of GroundingDINO cannot be loaded.*install transformers'):
            build_model(dict(model=model, default_scope='mmdet'))


def test_checkpointing_that_fairscale_does_is_left_out_without_it(plain):
    plain('grounding_dino')  # registers its language model
    config = config_of('grounding_dino').model
    config.encoder.num_cp = 2
    model = build_model(dict(model=config, default_scope='mmdet'))
    assert model.encoder.num_cp in (0, 2) and config.encoder.num_cp == 2


def test_what_no_graph_can_hold_is_named(plain):
    for name, prefixes, outside in (
        ('dino', ('backbone', 'neck'), {'encoder', 'decoder', 'bbox_head', 'memory_trans_fc'}),
        ('mask2former', ('backbone',), {'panoptic_head', 'panoptic_head.pixel_decoder'}),
        ('grounding_dino', ('backbone', 'neck'), {'encoder', 'decoder', 'bbox_head', 'memory_trans_fc'}),
    ):
        parts = graph_parts(plain(name))
        assert parts.prefixes == prefixes and outside <= set(parts.outside)
        assert all(parts.outside.values())


def test_the_rest_of_an_exported_model_has_all_its_weights(plain, tmp_path):
    """Those of no module but the model, too."""
    pytest.importorskip('onnxruntime')
    from psaq_mm.deploy.export import export_model
    from psaq_mm.deploy.serving import deploy_model_

    images = pictures()
    student = quantized(plain('deformable_detr'), FULL, images)
    exported = export_model(student, tmp_path / 'deployed', [SIZE])
    assert exported.manifest['replaced'] == ['backbone', 'neck'] and not exported.manifest['complete']
    deployed = quantized(plain('deformable_detr'))
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.zero_()
    deploy_model_(deployed, exported.directory, 'onnxruntime', 1)
    assert torch.equal(deployed.level_embed, student.level_embed)
    with torch.no_grad():
        found, wanted = (TaskModel(model, ('head',)).run(images[:1]).parts for model in (deployed, student))
    for one, other in zip(found, wanted):
        assert (one - other).norm() < 0.02 * other.norm()


# ---------------------------------------------------------------------- predictions
def test_panoptic_maps_are_compared_by_segments_whatever_their_numbers():
    truth = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [1005, 1005, 2005, 2005]])
    assert matched_pixels(truth, truth) == 12
    renumbered = np.where(truth == 1005, 3005, np.where(truth == 2005, 1005, truth))
    assert matched_pixels(renumbered, truth) == 12
    other_class = np.where(truth == 1, 4, truth)
    assert matched_pixels(other_class, truth) == 8
    merged = np.where(truth == 2005, 1005, truth)  # four pixels, half of which are each object
    assert matched_pixels(merged, truth) == 8


def test_agreement_of_panoptic_predictions(plain, tmp_path):
    model, images = plain('mask2former'), pictures()
    with torch.no_grad():
        out = model.predict(images, samples('mask2former', 2))
    assert task_predicting(out[0]).name == 'panoptic' and task_of(model).name == 'panoptic'
    truth = Predictions()
    for number, sample in enumerate(out):
        sample.set_metainfo(dict(img_id=number))
        truth.add(sample)
    truth.save(tmp_path / 'truth.npz')
    truth = Predictions.load(tmp_path / 'truth.npz')
    agreement = Agreement(truth)
    for number, sample in enumerate(out):
        agreement.add(number, sample)
    assert agreement.result()['agreement'] == 1.0
    del out[0].pred_panoptic_seg
    assert task_predicting(out[0]).name == 'detection'  # instance segmentation has boxes and masks


def test_attention_with_keys_of_its_own_is_refused(plain):
    model = copy.deepcopy(plain('detr'))
    attention = model.decoder.layers[0].self_attn
    attention.attn = torch.nn.MultiheadAttention(32, 2, add_bias_kv=True)
    with pytest.raises(UnsupportedModelError, match=r'decoder\.layers\.0\.self_attn\.attn of DETR'):
        quantize_model_(model, FULL)
