"""What losses and methods are made of, for people who add one; both packages stand on it.

- ``checks``: argument checks with one form of message, and ``check_values``, the switch for looking at values.
- ``reduction``: the reduction over images, the precision that results are computed in, the largest values.
- ``precision``: full float32 precision of matrix products, whatever the user allows elsewhere.
- ``resizing``: maps of 1 to 3 dimensions at another resolution.
- ``settings``: modules that hold the settings of a function.
- ``registration``: operators of the library for PyTorch's dispatcher, with gradients of gradients.
- ``launching``: on which device Triton launches a kernel.
"""
