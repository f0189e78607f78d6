"""What psaq_mm has to know of SeamNet. Only a config that quantizes imports it."""

from psaq_mm.models.adapters import Backbone, register_backbone
from psaq_mm.models.adapters.attention import attend
from psaq_mm.models.adapters.blocks import BlockParts, Feed, Writer
from psaq_mm.models.adapters.streams import output_reader, stream
from psaq_mm.quantization import StreamReader, apply_edge


class QuantRowAttention:
    """RowAttention whose two products are quantized."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        rows, _ = attend(self, rows, lambda q, k: (q * self.scale, k), lambda scores: scores.softmax(dim=-1))
        return self.proj(rows).reshape(x.shape)


class QuantSeamBlock:
    """SeamBlock whose two residual sums are edges."""

    def forward(self, x):
        x = apply_edge(self.residual1_quantizer, x + self.attn(self.norm1(x)))
        return apply_edge(self.residual2_quantizer, x + self.fc2(self.act(self.fc1(self.norm2(x)))))


@register_backbone
class DescribedSeamNet(Backbone):
    """SeamNet of this project."""

    names = ('welds.seam_net.SeamNet',)
    block_path = r'stages\.\d+\.\d+'
    blocks = {'welds.seam_net.SeamBlock': QuantSeamBlock}
    attention = {'welds.seam_net.RowAttention': QuantRowAttention}
    edges = ('stem', 'downsample')

    def parts(self, block):
        return BlockParts(
            feeds=(Feed(block.norm1, (block.attn.qkv,)), Feed(block.norm2, (block.fc1,))),
            writers=(Writer(block.attn.proj), Writer(block.fc2)),
            hidden=(block.fc1,),
        )

    def min_side(self, net):
        return 16

    def dynamic_size(self, net):
        return True

    def streams(self, model, net):
        return [
            ('the stream of stage 1', lambda: self.first(model, net)),
            ('the stream of stage 2', lambda: self.second(model, net)),
        ]

    def first(self, model, net):
        output = output_reader(model, net.norms[0], level=0, levels=2)
        both = StreamReader(net.norms[0], (*output.layers, net.downsample))
        return stream(net.stem, map(self.parts, net.stages[0]), [both])

    def second(self, model, net):
        output = output_reader(model, net.norms[1], level=1, levels=2)
        return stream(net.downsample, map(self.parts, net.stages[1]), [output])
