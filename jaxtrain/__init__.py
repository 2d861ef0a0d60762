"""jaxtrain: train language models from Hugging Face streams, resumable anywhere, bit for bit."""
