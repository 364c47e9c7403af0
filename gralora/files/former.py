"""Where pickles of earlier versions look for the classes in them.

A pickle names the module of every class that it holds. Up to 0.1 all modules lay flat in
`gralora/`.
"""

import sys

from gralora.layers import adapter, attention, class_change, convolution, experts, linear, scope
from gralora.model import saved

FORMER = {
    "gralora.adapter": adapter,
    "gralora.attention": attention,
    "gralora.convolution": convolution,
    "gralora.experts": experts,
    "gralora.inplace": class_change,
    "gralora.linear": linear,
    "gralora.saved": saved,
    "gralora.scope": scope,
}
"""By the name of before. A module whose classes are never in a pickle need not be here; `config`
has kept its name.
"""

sys.modules.update(FORMER)
