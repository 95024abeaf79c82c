"""What `upg-jax doctor --metal` finds out: do the kernels compile, are they right, how fast are they.

On a Mac with its GPU, elsewhere in the emulator, whose times mean nothing. An error in one line does not keep the
others from being tried.
"""

from upg_jax._metal_report._line import Line, as_text
from upg_jax._metal_report._report import report

__all__ = ["Line", "as_text", "report"]
