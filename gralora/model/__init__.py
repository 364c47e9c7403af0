"""Functions that take a whole model. Stands on `layers` and what is below.

Read `targets` (which layers; `defaults` where none are named) and `inject`, then `state` (which
adapters there are, which act, how a failed change is undone; `survey`: all of them in one walk) and
`control` (what a user does to them). `saved` is what is trained beside the adapters (`tokens`: some
rows of an embedding), `statistics` what must not move while they are, `record` what was adapted,
`state_dict` their values in memory. Starts: `loftq`, and `initialize` out of data; `groups` is what
an optimiser takes. `fit` is the adapter nearest to an update, `hotswap` room for others in an
adapter's place. `merge`, `combine`, `extract`, `suggest`, `shared`, `summary`, `effect` stand on
these, each for itself.
"""
