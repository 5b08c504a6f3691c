"""What a network does with an image, as a list of operations.

- ``record``: runs a network once and lists what it does.
- ``graph``: the operations that two recordings have in common, for batches of any size.
- ``read``: keeps the graphs of a network, and compares what they give with the network itself.
"""
