"""The Open Inference Protocol (KServe V2), bytes to bytes: request.py reads, response.py writes, spec.py describes.

Follows specification/protocol/inference_rest.md of the Open Inference Protocol and Triton's extensions "binary tensor
data", "classification", "statistics" and "model configuration". Knows neither HTTP nor torch; routes/open_inference.py
is the edge.

With binary data a body is JSON, whose length a header gives, followed by the raw tensors in order, without padding.
Numbers are little-endian, in row-major order; an element of BYTES is its length in four bytes, then its bytes.

Shape letters: N images, H = W = 32, C = 3, K classes.
"""
