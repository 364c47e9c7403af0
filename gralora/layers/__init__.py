"""One linear map and the adapters on it. Uses `engines` and `maths`.

Read `adapter` (one adapter, and all adapters of one map), `linear_map` (one map of a model, adapted
or not), `base` (`GraloraLayer`, which computes base and adapters), then `class_change` (a module
gets a new class in place), `in_place` (a layer that is a map), `parts` (maps inside a module), and
one kind: `linear`, `embedding`, `convolution`, `attention`, `experts`. `kinds` is their table: a
new kind is a file here and a row there.

In addition: `effective_weight`, W + ΔW for code that reads the weight of a map; `lazy_weight`, the
tensor that this code gets; `running`, who calls; `scope`, the modes that `with` blocks set;
`loading`, adapters in `load_state_dict`; `pending`, gradients that arrive late; `still`, frozen
norms.
"""
