import json

from latent_engine.kernels.triton import mmd

from aot import spilled_bytes

INTEGERS = ("N", "M", "D", "share", "row_n", "row_d", "other_n", "other_d", "x_n", "x_d", "y_n", "y_d")
TYPES = {**dict.fromkeys(INTEGERS, "i32"), "unit": "fp32", "factor": "fp32", "sums": "*fp64"}

results = {}
for D, kernel, same in ((2, 0, True), (7, 3, False), (64, 1, True), (64, 1, False), (64, 2, True), (512, 4, False)):
    options = dict(COUNT=0 if kernel == 4 else 7, KERNEL=kernel, row_d=1, other_d=1, x_d=1, y_d=1, SAME=same,
                   **mmd.blocks(D))
    aligned = {"D", "row_n", "other_n", "x_n", "y_n"} if D % 16 == 0 else set()
    for with_grad in (False, True):
        results[f"pairs D={D} kernel={kernel} same={same} grad={with_grad}"] = spilled_bytes(
            mmd._pairs, {**options, "WITH_GRAD": with_grad}, TYPES, aligned, mmd.NUM_WARPS)
    results[f"matrix D={D} kernel={kernel}"] = spilled_bytes(mmd._matrix, options, TYPES, aligned, mmd.NUM_WARPS)
print(json.dumps(results))
