"""`python -m upg_jax.cli`."""

from upg_jax.cli import main

main()
