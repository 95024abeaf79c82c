"""An HTTP server with OpenAI's interface."""

from __future__ import annotations

from upg_jax.serve._app import create_app
from upg_jax.serve._limits import Limits
from upg_jax.serve._run import bind, run

__all__ = ["Limits", "bind", "create_app", "run"]
