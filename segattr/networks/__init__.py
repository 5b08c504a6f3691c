"""Reading networks: what every method that makes maps asks of a classifier or a detector.

- ``classifier``, ``cut``: a classifier in two parts, features and head.
- ``classes``: the classes that maps are wanted for.
- ``modes``: evaluation mode that is put back.
- ``detector``, ``proposals``: a detector as a function of an image and boxes, and the proposals around an object.
"""
