"""The share of a merged checkpoint's numbers that are the float64 result, correctly rounded.

python benchmarks/merge_rounding.py CHECKPOINT LORA MERGED WEIGHT      (prints one JSON object)
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors import safe_open

from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.module import LORA_KINDS


def main(checkpoint: str, lora: str, merged: str, weight: str) -> None:
    right = changed = untouched = same = 0
    with open_tensors(checkpoint) as file, safe_open(lora, "pt") as factors, safe_open(merged, "pt") as result:
        places: dict[str, list] = {}
        for component in recognise(file).components.values():
            for module in component.values():
                if module.kind in LORA_KINDS and module.name and module.weight:
                    places.setdefault(module.weight.name, []).append(module)
        for key, info in file.tensors.items():
            before, after = file.read(info), result.get_tensor(key)
            if key not in places:
                untouched += 1
                same += torch.equal(before, after)
                continue
            exact = before.double().flatten(1)
            for module in places[key]:
                start = (module.weight.offset - info.offset) // (info.nbytes // info.shape[0])
                up, down = (factors.get_tensor(f"{module.name}.lora_{side}.weight") for side in ("up", "down"))
                rank = down.shape[0]
                scale = float(weight) * float(factors.get_tensor(f"{module.name}.alpha")) / rank
                rows = exact[start : start + up.shape[0]]
                rows += scale * (up.double().flatten(1) @ down.double().flatten(1))
            # by numpy: torch goes from float64 to 16 bits by way of float32, which rounds twice
            right += int((exact.numpy().astype("float16") == after.flatten(1).numpy()).sum())
            changed += exact.numel()
    print(json.dumps({"rounded": right / changed, "numbers": changed, "untouched": untouched, "same": same}))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
