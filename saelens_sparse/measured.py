"""Where one way of computing overtakes another: every such limit, measured.

Rows of the measurements are in `benchmarks/results`; `docs/performance.md` says what they show.
"""

# Shares of active latents above which SAELens's dense step is faster, where a configuration sets
# them; by whether its products run in full precision. See "When sparse loses" there.
MAX_SPARSE_DENSITY = {True: 1 / 8, False: 1 / 40}

# Shares of pairs above which dense products are faster, where a training changes them; by backend
# ("cpu" for PyTorch on a CPU) and by whether products run in full precision.
MAX_MEASURED_DENSITY = {
    ("triton", True): 0.09,
    ("triton", False): 0.0038,
    ("torch", True): 0.03,
    ("torch", False): 0.03,
    ("cpu", True): 0.12,
    ("cpu", False): 0.03,
}
# A path is left for the other only when that one is faster by this much.
HYSTERESIS = 0.8
# A float8 screen lists up to 1.7 times the pairs that dense products count, on normal scores.
FLOAT8_HYSTERESIS = 0.5

# Without gradient buffers pairs are summed twice, for the norm and for the update. With more pairs
# a latent than this, buffers are faster.
MAX_PAIRS_PER_LATENT = 12

# Elements of W_enc up to which steps are graphs, so that a slow host does not limit them. Under
# autocast on one H100, a Top-K step at 2304 -> 262,144 took 19.5 ms as graphs and 20.5 ms without,
# at 4096 -> 131,072 18.0 and 18.2 ms. Graphs take 0.1 GiB. With 1,048,576 latents they would save
# at most 1% of a step, where memory is scarce.
MAX_GRAPH_ELEMENTS = 2**30

# GEMMs over the dead latents are padded to a multiple of this: with an odd width they lose
# Hopper's instructions.
DEAD_ALIGNMENT = 64

# On a CPU: share of rows that a Top-K screen may leave to the full product, as far as that saves
# anything; and share of pairs that a threshold screen may leave open.
MAX_UNCERTAIN_ROWS = 1 / 4
MAX_CPU_CANDIDATES = 1 / 32

# On a CPU: bytes of the products of one chunk of rows, and the number of multiplications from which
# a screen saves time. See "On a CPU" there.
CPU_CHUNK_BYTES = 32 * 2**20
MIN_SCREENED_PRODUCT = 2**30

# Weights of the language model's blocks times tokens of the run, from which compiling pays on a
# GPU; by whether attention scores are soft-capped. Compiling takes up to 20 s. On an H100 it saves
# 0.03 to 0.09 microseconds a token for GPT-2 small to layer 8 (64 M weights). It saves 0.8 to 2.0
# for a Llama of Gemma-2-2B's shape to layer 12 (1.0 G), and 3.2 to 4.7 for Gemma-2-2B itself.
MIN_COMPILED_WORK = {False: 2.5e16, True: 6e15}
