"""Floor 0: pure functions on arrays. No modules, no optimizers, no disk; never imports the rest of attrib.

- `slopes`: elementwise discrete gradients, (f(x1) - f(x0)) / (x1 - x0) without cancellation
- `discrete`: discrete gradients of softmax, maxima and anything else (Gonzalez)
- `recurrence`: an optimizer step with frozen coefficients, forwards and backwards
- `factors`: gradients of single examples in the form that layers give them, one file for each kind
- `pairs`: rows of a matrix for many queries as sums of few products
- `contraction`: sensitivities times per-example gradients, float64 accumulation
- `compiled`: its loops that numba compiles, loaded when they are needed
- `hashing`: one 64-bit word per row of an array
- `keys`: a table from such words to rows, that grows
"""
