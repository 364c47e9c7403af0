"""One linear map and the adapters on it. Stands on `engines` and `maths`.

Read `adapter` (one adapter, and all of one map), `linear_map` (one map of a model, adapted or not),
`base` (`GraloraLayer`: what is common to every adapted map), then `class_change` and `in_place` (a
layer that becomes an adapted one), `parts` (maps that are no layers of their own), and one kind:
`linear`, `embedding`, `convolution`, `attention`, `experts`. `kinds` is their table: a new kind is
a file here and a row there.

In addition: `effective_weight`, W + ΔW for code that reads the weight of a map, `lazy_weight`, the
tensor that it gets, and `running`, whether a forward reads; `loading`, what a state dict says of
adapters; `scope`, what a `with` block switches; `pending`, what a forward that has been still needs
of an adapter that acts no more; `still`, a frozen norm under an adapter.
"""
