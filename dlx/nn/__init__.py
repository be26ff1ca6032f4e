"""`flax.linen`, with layers that are fast on a CPU in place of some of its own.

``from dlx import nn`` where it said ``import flax.linen as nn``: all of flax.linen is here, and the
names below take the place of its own: the same arguments and parameters, and the same numbers but
for their rounding, so that a checkpoint moves between the two. The form is chosen when a function
is lowered: for GPU and TPU it is exactly flax's. ``with nn.plain():`` (or ``DLX_PLAIN=1``) it is
flax's on a CPU as well.

Why each form is faster, and by how much, stands in its file.
"""

from flax.linen import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

from dlx import memory
from dlx.nn.activations import gelu as gelu
from dlx.nn.causal_attention import MultiHeadDotProductAttention as MultiHeadDotProductAttention
from dlx.nn.causal_attention import dot_product_attention as dot_product_attention
from dlx.nn.conv import Conv as Conv
from dlx.nn.conv_transpose import ConvTranspose as ConvTranspose
from dlx.nn.dense import Dense as Dense
from dlx.nn.dense import DenseGeneral as DenseGeneral
from dlx.nn.dense import Embed as Embed
from dlx.nn.layer_norm import LayerNorm as LayerNorm
from dlx.nn.lowering import plain as plain
from dlx.nn.pools import max_pool as max_pool
from dlx.nn.recurrence import RNN as RNN

memory.at_once()
