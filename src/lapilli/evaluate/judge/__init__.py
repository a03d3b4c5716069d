"""A judge model's scores for answers, over any OpenAI-compatible endpoint: LLaVA's and Quilt-LLaVA's, and grading."""
