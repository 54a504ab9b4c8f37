import json

from latent_engine.kernels.triton import importance

from aot import spilled_bytes

TYPES = {**dict.fromkeys(("S", "N", "D", "share", "size", "stride_s", "stride_n", "stride_d"), "i32"),
         **dict.fromkeys(("sign", "scale", "elbo"), "fp32")}
WIDE = dict.fromkeys(("tops", "sums", "squares", "totals"), "*fp64")

results = {}
for D, normal, flag, z_type in ((2, True, True, "*fp32"), (7, False, False, "*bf16"), (32, True, True, "*fp32"),
                                (50, True, False, "*fp16"), (512, False, True, "*fp32")):
    constants = {"NORMAL_PRIOR": normal, "HAS_GRAD": flag, "NEED_Z": True, "NEED_POSTERIOR": True, "stride_d": 1,
                 **importance.blocks(D)}
    for kernel in (importance._log_weights, importance._backward):
        results[f"{kernel.fn.__name__} D={D} normal={normal} flag={flag} {z_type}"] = spilled_bytes(
            kernel, constants, {**TYPES, "z": z_type, "grad_z": z_type},
            {"D", "stride_s", "stride_n"} if D % 16 == 0 else set(), importance.NUM_WARPS)
for extreme, dtype in ((False, "fp32"), (True, "fp32"), (False, "fp64")):
    constants = {"EXTREME": extreme, "DTYPE": importance.tl.dtype(dtype), "ROWS": importance.ROWS,
                 "COLUMNS": importance.COLUMNS}
    types = {**TYPES, **(WIDE if dtype == "fp64" else {})}
    results[f"_moments {extreme} {dtype}"] = spilled_bytes(importance._moments, constants, types, set(), importance.NUM_WARPS)
    if dtype == "fp32":
        results[f"_weights {extreme}"] = spilled_bytes(importance._weights, constants, types, set(), importance.NUM_WARPS)
results["_excess"] = spilled_bytes(importance._excess, {"ROWS": importance.ROWS, "COLUMNS": importance.COLUMNS}, TYPES, set(),
                                   importance.NUM_WARPS)
print(json.dumps(results))
