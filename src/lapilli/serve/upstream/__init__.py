"""Other servers that make the answers: vLLM, SGLang, any of OpenAI's API; started here or running already."""
