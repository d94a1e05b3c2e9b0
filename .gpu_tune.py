import dataclasses, sys, torch
from benchmarks.kernels import make_problem, milliseconds
from saelens_sparse.ops import select_triton as st, select_topk


def kernel_ms(f, names):
    f()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(10):
            f()
        torch.cuda.synchronize()
    out = {}
    for e in p.key_averages():
        for n in names:
            if n in e.key:
                out[n] = e.self_device_time_total / 1e4
    return out


base = st.LAUNCH
for shape, dtype in (
    ((2304, 65536, 64, 4096), torch.float32),
    ((2304, 65536, 64, 4096), torch.bfloat16),
    ((768, 24576, 32, 4096), torch.float32),
    ((2304, 262144, 64, 4096), torch.bfloat16),
):
    p = make_problem(*shape, dtype)

    def f():
        return select_topk(p.x, p.weight, p.bias, p.norms, p.k, "triton", 2**30)

    st.LAUNCH = base
    print(
        shape,
        dtype,
        "select",
        round(milliseconds(f), 3),
        "recomputed",
        f().rows_recomputed,
        kernel_ms(
            f,
            [
                "_group_bounds",
                "_reaching",
                "_candidates_kernel",
                "_rescore",
                "_select_kernel",
                "_round_rows",
            ],
        ),
        flush=True,
    )
    for cols, rows, warps in (
        (256, 8, 4),
        (256, 4, 4),
        (256, 4, 2),
        (256, 16, 4),
        (256, 16, 8),
        (512, 4, 4),
        (512, 8, 8),
        (512, 8, 4),
        (1024, 4, 4),
        (1024, 4, 8),
        (1024, 2, 4),
        (128, 16, 4),
        (128, 8, 2),
        (128, 32, 4),
    ):
        st.LAUNCH = dataclasses.replace(base, BOUND_COLS=cols, BOUND_ROWS=rows, BOUND_WARPS=warps)
        try:
            print("  ", cols, rows, warps, kernel_ms(f, ["_group_bounds"]), flush=True)
        except Exception as e:
            print("  ", cols, rows, warps, "failed", type(e).__name__)
