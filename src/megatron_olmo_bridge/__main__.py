"""``python -m megatron_olmo_bridge`` is ``olmo-bridge``."""

from megatron_olmo_bridge.cli import main

main()
