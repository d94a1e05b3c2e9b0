"""What every operation uses.

Shapes in the comments of kernels are made of these letters:

    N rows          L latents       D columns of a row, d_in
    K pairs of a row                P pairs
    C candidates of a row           G groups of latents
    W words of marks                B blocks
    T tiles of columns              S partial sums
    M width of padded rows          R rows of x or of a weight
"""
