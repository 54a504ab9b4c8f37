import json

from latent_engine.kernels.triton import mmd_normal

from aot import spilled_bytes

FLOATS = ("unit", "prior_variance", "pair_weight", "cross_weight", "largest")
TYPES = {**dict.fromkeys(("N", "D", "nodes", "count", "x_stride_n", "v_stride_n"), "i32"), **dict.fromkeys(FLOATS, "fp32")}

results = {}
for D, posteriors, imq, gradient, x_type in ((2, True, False, True, "*fp32"), (64, True, False, True, "*bf16"),
                                             (64, True, False, False, "*fp32"), (64, False, True, True, "*fp32"),
                                             (64, False, False, True, "*fp16"), (512, True, False, True, "*fp32")):
    constants = dict(BIASED=False, POSTERIORS=posteriors, IMQ=imq, GRADIENT=gradient, x_stride_d=1, v_stride_d=1,
                     **mmd_normal.blocks(D))
    results[f"D={D} posteriors={posteriors} imq={imq} gradient={gradient} {x_type}"] = spilled_bytes(
        mmd_normal._rows, constants, {**TYPES, "x": x_type}, {"D", "x_stride_n"} if D % 16 == 0 else set(),
        mmd_normal.NUM_WARPS)
print(json.dumps(results))
