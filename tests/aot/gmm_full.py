import json

from latent_engine.kernels.triton import gmm_full

from aot import spilled_bytes

TYPES = dict.fromkeys(("N", "K", "D", "stride_n", "stride_d", "share", "begin"), "i32")

results = {}
for D, flag, z_type in ((2, False, "*fp32"), (7, True, "*bf16"), (32, False, "*fp32"), (64, True, "*fp16"),
                        (64, False, "*fp32")):
    shape = gmm_full.blocks(D)
    warps = shape.pop("num_warps")
    constants = dict(HAS_COEF=flag, WITH_LOGITS=flag, WHOLE=not flag, stride_d=1, **shape)
    for kernel in (gmm_full._forward, gmm_full._rows, gmm_full._moments):
        results[f"{kernel.fn.__name__} D={D} flag={flag} {z_type}"] = spilled_bytes(
            kernel, constants, {**TYPES, "z": z_type, "grad_z": z_type}, {"D", "stride_n"} if D % 16 == 0 else set(), warps)
print(json.dumps(results))
