"""Speed and questions: a decoding loop for responses of different lengths, and what a model is asked at load."""
