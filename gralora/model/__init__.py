"""Functions that take a whole model. Uses `layers` and what is below.

Read `targets` (which layers; `defaults` where none are named) and `inject`, then `index`
(everything that concerns adapters, in one walk), `state` (activate, all or nothing) and `control`
(what a user does to adapters). `saved` is what an adapter trains in addition to its pairs: copies
of modules, of which `partial_copies` and `tokens` hold only a part; `biases` are those of adapted
maps in files, `statistics` frozen norms, `state_dict` the values of an adapter in memory. Starts:
`loftq`, and `initialize` from data; `groups` is what an optimizer takes. `fit` is the adapter
nearest to an update, `hotswap` room for adapters of higher ranks. `merge`, `combine`, `extract`,
`suggest`, `shared`, `summary`, `effect` use these, each on its own.
"""
