import json

from latent_engine.kernels.triton import reparametrize

from aot import spilled_bytes

STRIDES = ("mean_n", "log_var_n", "noise_s", "noise_n", "grad_z_s", "grad_z_n", "grad_kl_n")
TYPES = dict.fromkeys(("S", "N", "D", "share", "grad_z_d", "grad_kl_d", *STRIDES), "i32")

results = {}
for S, D, flag, kind in ((1, 2, True, "*fp32"), (1, 50, False, "*fp32"), (1, 1024, True, "*bf16"), (50, 50, True, "*fp32"),
                         (8, 64, False, "*fp16"), (5000, 7, True, "*fp32")):
    constants = {"HAS_Z": True, "HAS_KL": flag, "NEED_MEAN": True, "NEED_LOG_VAR": True, "mean_d": 1, "log_var_d": 1,
                 "noise_d": 1, **({"S": 1} if S == 1 else {}), **reparametrize.blocks(S, D)}
    aligned = {"D", *STRIDES} if D % 16 == 0 else set()
    for kernel in (reparametrize._forward, reparametrize._backward):
        results[f"{kernel.fn.__name__} S={S} D={D} kl={flag} {kind}"] = spilled_bytes(
            kernel, constants, {**TYPES, "mean": kind, "dmean": kind}, aligned, reparametrize.NUM_WARPS)
print(json.dumps(results))
