"""Numbers that the mathematics, the encoder and the kernels must agree on."""

# Entries of the momentum's codebook: a code is one byte.
CODES = 256

# Entries of the codebook of four-bit codes.
LEVELS = 16

# Equal bins on [-1, 1] of the histogram that the codebook is learned from.
HISTOGRAM_BINS = 4096

# A leaf of at most this many elements keeps exact float32 moments: the bytes do not matter there,
# and one scale for elements of very different size would.
SMALL_LEAF = 4096

# Vectors (biases, norms) keep exact moments as long as all of them together stay under this share
# of the model.
VECTOR_SHARE = 0.01

# Elements of a shared block: few enough for one scale, enough to keep 8 bytes per block small
# (8 / 256 = 0.031 bytes per parameter). Among blocks that explain the gradient equally well, the
# one nearest to the target is taken. A matrix with shorter rows or columns has blocks as small as
# these, if not narrower than NARROW_BLOCK.
NARROW_BLOCK = 64
MIN_BLOCK = 256
TARGET_BLOCK = 1024
MAX_BLOCK = 4096

# Elements of a dual code's block: they share a scale and the range of nu's levels, for 5 / 256 =
# 0.020 bytes per parameter. Less where an axis is short, more where it has no better divisor.
DUAL_BLOCK = 256
DUAL_MIN = 64
DUAL_MAX = 1024

# A matrix with more than so many columns per row counts as an output layer: one column per token.
OUTPUT_LAYER = 8
