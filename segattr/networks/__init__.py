"""Reading networks: what every method that makes maps asks of a classifier or a detector.

- ``reader``: what a network does with an image, as a list of operations.
- ``layout``, ``cut``, ``classifier``, ``features``: a classifier in two parts, features and head, and what they give.
- ``spatial``: the spatial dimensions of images and of volumes.
- ``classes``: the classes that maps are wanted for.
- ``modes``: evaluation mode that is put back.
- ``detector``, ``proposals``: a detector as a function of an image and boxes, and the proposals around an object.
"""

from segattr.networks.modes import evaluating

__all__ = ["evaluating"]
