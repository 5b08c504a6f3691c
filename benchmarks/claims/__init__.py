"""The papers' claims, one by one, on photographs of Pascal VOC: what holds with a pretrained network, and what not."""
