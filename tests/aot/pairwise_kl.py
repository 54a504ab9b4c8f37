import json

from latent_engine.kernels.triton import pairwise_kl as kernels

from aot import spilled_bytes

TYPES = {**dict.fromkeys(("N", "D", "share"), "i32"), "values": "*fp64", "sums": "*fp64", "squares": "*fp64"}

results = {}
for D, grad in ((2, True), (32, False), (32, True), (64, True), (1024, True)):
    aligned = {"D", "N"} if D % 16 == 0 else set()
    for kernel, shape in ((kernels._diversity, kernels.blocks(D)), (kernels._deviation, kernels.blocks(D, widest=D))):
        constants = dict(GRAD=grad, ROUND=kernels.ROUND, **shape)
        results[f"{kernel.fn.__name__} D={D} grad={grad}"] = spilled_bytes(kernel, constants, TYPES, aligned, kernels.NUM_WARPS)
results["_moments"] = spilled_bytes(kernels._moments, {"BLOCK_N": 64, "BLOCK_D": 32}, TYPES, set(), kernels.NUM_WARPS)
print(json.dumps(results))
