"""Generation of answers: the cache, sampling, the engine, and answering files of prompts."""
