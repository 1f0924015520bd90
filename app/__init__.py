"""The service: weights/cifar_net.pth in, class probabilities out. Imports nothing of training."""
