from megatron_olmo_bridge.inference.forward import *  # temporary
