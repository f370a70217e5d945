from megatron_olmo_bridge.inference.generate import *  # temporary
from megatron_olmo_bridge.inference.sampling import *
