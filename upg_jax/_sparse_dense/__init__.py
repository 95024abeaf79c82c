"""`sparse_dense`: the product with a compressed layer, as a JAX primitive.

Split by concern: `_api` checks arguments, `_primitive` binds and evaluates shapes, `_differentiation` and
`_batching` hold the rules, `_backend` chooses, `_lowering` maps platforms to implementations, and `_reference`
is the definition of correct.
"""

from upg_jax._sparse_dense import _batching, _differentiation, _lowering  # noqa: F401  (they register rules)
from upg_jax._sparse_dense._api import sparse_dense
from upg_jax._sparse_dense._backend import BACKENDS, choose_backend, unavailable_reason, use_backend
from upg_jax._sparse_dense._many import sparse_dense_many

__all__ = [
    "BACKENDS",
    "choose_backend",
    "sparse_dense",
    "sparse_dense_many",
    "unavailable_reason",
    "use_backend",
]
