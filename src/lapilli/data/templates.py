"""The templates that lapilli ships, as plain data: what each one puts around questions and answers.

Names without a date are those of LLaVA 1.2 (and of KoLLaVA where it has its own). Names ending in `-2023-06` are
LLaVA's as of June 2023, the time of the v0 weights and of the KoLLaVA document: other texts, partly under the same
names. The table is torch-free, so that a misspelt name is reported at once; `lapilli.data.template` gives the fields
their meaning.
"""

from typing import Any

_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# No space before "The visual": so it was trained.
_TAGGED_PICTURES = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SAFETY = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_KOREAN_ASSISTANT = (
    "당신은 유용한 언어 및 시각 도우미입니다. 사용자가 제공하는 시각적 콘텐츠를 이해할 수 있으며, "
    "자연어를 사용하여 사용자에게 다양한 작업을 지원합니다."
)
_WAIV_LAB = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)
_WAIV_LAB_LEGACY = (
    "You are LLaVA, a large language model trained by UW Madison WAIV Lab."
    "You are designed to assist human with a variety of tasks using natural language."
    "Follow the instructions carefully."
)
_RENEWABLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)
_HELLO = ("Hi!", "Hi there!  How can I help you today?\n")


def _turns(system: str, user: str = "USER", assistant: str = "ASSISTANT", end: str = "</s>") -> dict[str, Any]:
    """Vicuna 1.1's shape: `{S} USER: Q ASSISTANT: A</s>USER: ...`."""
    return {
        "system": system,
        "system_suffix": " ",
        "user_prefix": f"{user}: ",
        "user_suffix": " ",
        "answer_prefix": f"{assistant}:",
        "answer_lead": " ",
        "answer_end": end,
        "opening_answer": "drop",
        "stop": (end,),
    }


def _signalled(user: str, assistant: str) -> dict[str, Any]:
    """The text LLaVA trains on under every name its mask code does not know: each turn is a line after `### `."""
    return {
        "system_suffix": "\n\n### ",
        "user_prefix": f"{user}: ",
        "user_suffix": "\n### ",
        "answer_prefix": f"{assistant}:",
        "answer_lead": " ",
        "answer_end": "\n###",
        "answer_tail": " ",
    }


def _hashes(system: str, *examples: tuple[str, str]) -> dict[str, Any]:
    """Vicuna 0's shape, prompts `{S}###Human: Q###Assistant: A###...`; training text has line breaks (`_signalled`)."""
    return {
        "system": system,
        "system_suffix": "###",
        "user_prefix": "Human: ",
        "user_suffix": "###",
        "answer_prefix": "Assistant:",
        "answer_lead": " ",
        "answer_end": "###",
        "examples": examples,
        "stop": ("###",),
        "training": _signalled("Human", "Assistant"),
    }


def _inst(system: str, between: str) -> dict[str, Any]:
    """Llama 2's shape: `[INST] <<SYS>>\\n{S}\\n<</SYS>>\\n\\nQ [/INST] A </s>`, then `between` before each question."""
    return {
        "system": system,
        "system_place": "in_first_user",
        "system_prefix": "<<SYS>>\n",
        "system_suffix": "\n<</SYS>>\n\n",
        "first_user_prefix": "[INST] ",
        "user_prefix": f"{between}[INST] ",
        "user_suffix": " [/INST]",
        "answer_lead": " ",
        "answer_end": " </s>",
        "opening_answer": "drop",
        "stop": ("</s>",),
    }


def _chatml(system: str, after_mark: str = "", opening_answer: str = "drop") -> dict[str, Any]:
    """ChatML's shape; LLaVA puts nothing after `<|im_end|>`, Qwen a line break."""
    return {
        "system": system,
        "system_prefix": "<|im_start|>system\n",
        "system_suffix": f"<|im_end|>{after_mark}",
        "user_prefix": "<|im_start|>user\n",
        "user_suffix": f"<|im_end|>{after_mark}",
        "answer_prefix": "<|im_start|>assistant\n",
        "answer_end": "<|im_end|>",
        "answer_tail": after_mark,
        "opening_answer": opening_answer,
        "stop": ("<|im_end|>",),
    }


_MMTAG = {"image_prefix": "<Image>", "image_suffix": "</Image>"}

_PLAIN = {"user_text": "drop", "answer_end": "\n", "stop": ("\n",)}

_KOLLAVA_MISTRAL = {
    **_turns(_KOREAN_ASSISTANT, "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "opening_answer": "keep",
    # KoLLaVA's prompts end an answer with <|im_end|>, its training text with ###; weights of its own write the latter.
    "stop": ("<|im_end|>", "###"),
    "training": _signalled("<|im_start|>user\n", "<|im_start|>assistant\n"),
}

_LLAMA_3 = {
    "system_prefix": "<|start_header_id|>system<|end_header_id|>\n\n",
    "system_suffix": "<|eot_id|>",
    "user_prefix": "<|start_header_id|>user<|end_header_id|>\n\n",
    "user_suffix": "<|eot_id|>",
    "answer_prefix": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "answer_end": "<|eot_id|>",
    "stop": ("<|eot_id|>",),
}

_MPT_2023 = (
    "- You are a helpful language and vision assistant.\n"
    "- You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.\n"
    "- You should follow the instructions carefully and explain your answers in detail."
)
_MPT_MULTIMODAL_2023 = (
    "- You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab.\n"
    "- You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.\n"
    "- You should follow the instructions carefully and explain your answers in detail."
)
_MPT_TEXT_2023 = (
    "- You are a helpful assistant chatbot trained by MosaicML.\n"
    "- You answer questions.\n"
    "- You are excited to be able to help the user, "
    "but will refuse to do anything that could be considered harmful to the user.\n"
    "- You are more than just an information source, "
    "you are also able to write poetry, short stories, and make jokes."
)

TABLE: dict[str, dict[str, Any]] = {
    # LLaVA 1.2
    "default": _hashes(_CURIOUS_HUMAN, _RENEWABLE),
    "v0": _hashes(_CURIOUS_HUMAN, _RENEWABLE),
    "llava_v0": _hashes(_CURIOUS_HUMAN),
    "v0_mmtag": {**_hashes(_TAGGED_PICTURES), **_MMTAG},
    "v1": _turns(_CURIOUS_USER),
    "vicuna_v1": _turns(_CURIOUS_USER),
    "llava_v1": _turns(_CURIOUS_HUMAN),
    "v1_mmtag": {**_turns(_TAGGED_PICTURES), **_MMTAG},
    "llama_2": _inst(_LLAMA_2_SAFETY, "<s>"),
    "llava_llama_2": _inst(_LANGUAGE_AND_VISION, "<s>"),
    "mistral_instruct": _inst("", ""),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "chatml_direct": _chatml("Answer the questions."),
    "mistral_direct": _chatml("Answer the questions."),
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    # KoLLaVA; its own name for it is `mistral`
    "kollava_mistral": _KOLLAVA_MISTRAL,
    "mistral": _KOLLAVA_MISTRAL,
    # Other families
    "chatml": _chatml("You are a helpful assistant.", "\n", "keep"),
    "llama_3": _LLAMA_3,
    # LLaVA of June 2023; `v0-2023-06` is what `--version v0` trained then
    "default-2023-06": _hashes(_CURIOUS_HUMAN, _RENEWABLE),
    "v0-2023-06": _hashes(_CURIOUS_HUMAN, _RENEWABLE),
    "v1-2023-06": _hashes(_CURIOUS_HUMAN, _RENEWABLE),
    "simple-2023-06": _hashes(_CURIOUS_HUMAN, ("Hi!", "Hi there! How can I help you today?")),
    "simple_legacy-2023-06": _hashes(_WAIV_LAB_LEGACY, ("Hi!\n\n### Response:", _HELLO[1])),
    "multimodal-2023-06": _hashes(_WAIV_LAB, _HELLO),
    "llava_v1-2023-06": _turns(_WAIV_LAB),
    "vicuna_v1_1-2023-06": _turns(_CURIOUS_USER),
    "bair_v1-2023-06": _turns("BEGINNING OF CONVERSATION:", assistant="GPT"),
    "mpt-2023-06": _chatml(_MPT_2023),
    "mpt_multimodal-2023-06": _chatml(_MPT_MULTIMODAL_2023),
    "mpt_text-2023-06": _chatml(_MPT_TEXT_2023),
}
