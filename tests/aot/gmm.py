import json

from latent_engine.kernels.triton import gmm

from aot import spilled_bytes

TYPES = {**dict.fromkeys(("N", "K", "D", "stride_n", "stride_d", "share"), "i32"), "labels": "*i64", "allowed": "*u8"}

results = {}
for D, masked, flag, z_type in ((2, False, False, "*fp32"), (7, True, False, "*bf16"), (16, False, False, "*fp32"),
                                (64, False, False, "*fp32"), (64, True, True, "*fp16"), (512, False, False, "*fp32")):
    constants = dict(HAS_LABELS=masked, HAS_ALLOWED=masked, HAS_COEF=flag, WITH_LOGITS=flag, WHOLE=not flag,
                     ROUND=gmm.ROUND, stride_d=1, **gmm.blocks(D))
    for kernel in (gmm._forward, gmm._backward_rows, gmm._backward_components):
        name = f"{kernel.fn.__name__} D={D} masked={masked} flag={flag} {z_type}"
        results[name] = spilled_bytes(kernel, constants, {**TYPES, "z": z_type, "grad_z": z_type},
                                      {"D", "stride_n"} if D % 16 == 0 else set(), gmm.NUM_WARPS)
print(json.dumps(results))
