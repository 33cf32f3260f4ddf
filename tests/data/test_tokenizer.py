import pytest

from mmpeft_fast.data import train_tokenizer

SPECIALS = ("<image>", "<|im_end|>")


def test_same_text_same_tokenizer(samples):
    first, second = (train_tokenizer(samples, SPECIALS) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_any_text_survives_and_known_text_is_short(samples):
    tokenizer = train_tokenizer(samples, SPECIALS)
    text = "never seen: Ω 😀\t  spaces\nwhat color is it?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" ASSISTANT: red")) <= 4


def test_special_tokens_are_one_id_each(samples):
    tokenizer = train_tokenizer(samples, SPECIALS)
    for token in (*SPECIALS, "<pad>", "<s>", "</s>"):
        assert tokenizer.encode(f"a{token}b").count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert set(SPECIALS) <= set(tokenizer.all_special_tokens)


@pytest.mark.parametrize(("side", "pad_column"), [("right", -1), ("left", 0)])
def test_padding_side(samples, side, pad_column):
    tokenizer = train_tokenizer(samples, SPECIALS, padding_side=side)
    ids = tokenizer(["yes", "yes or no, which?"], padding=True).input_ids
    assert ids[0][pad_column] == tokenizer.pad_token_id != ids[1][pad_column]


def test_bad_requests(samples):
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 261 \(256 bytes, 5 special\), got 260"):
        train_tokenizer(samples, SPECIALS, vocab_size=260)
    with pytest.raises(ValueError, match="padding_side: expected 'right' or 'left', got 'up'"):
        train_tokenizer(samples, SPECIALS, padding_side="up")
    assert len(train_tokenizer(samples, SPECIALS, vocab_size=261)) == 261
