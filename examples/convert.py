"""Convert a checkpoint without a model: to Megatron, back, and prove that nothing was lost.

usage: python convert.py HF WORK      (HF: a folder or a hub id such as allenai/OLMo-2-0425-1B)
       torchrun --nproc_per_node 4 convert.py HF WORK      divides the files among four processes
"""

import os
import sys
from pathlib import Path

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, verify


def main() -> None:
    source, work = sys.argv[1], Path(sys.argv[2])
    import_checkpoint(source, work / "megatron")
    export_checkpoint(work / "megatron", work / "hf")
    if os.environ.get("RANK", "0") == "0":
        result = verify(work / "megatron", work / "hf")
        print(f"{result.compared} tensors: {'equal' if result.equal else result.differences}")


if __name__ == "__main__":
    main()
