"""The study's published data sets: one file each, and one line in `SETS`; and the small study's, `EASY_VQA_SETS`."""

from mmpeft_fast.data.sets.dataset import DataSet, TaskSample
from mmpeft_fast.data.sets.easy_vqa import EASY_VQA_SETS
from mmpeft_fast.data.sets.flickr30k import FLICKR30K
from mmpeft_fast.data.sets.iconqa import ICONQA_BLANK, ICONQA_TXT
from mmpeft_fast.data.sets.llava import LLAVA
from mmpeft_fast.data.sets.load import BadRecords, decodable, fitting, load_set
from mmpeft_fast.data.sets.ocr_vqa import OCR_VQA
from mmpeft_fast.data.sets.okvqa import OKVQA
from mmpeft_fast.data.sets.pope import POPE
from mmpeft_fast.data.sets.science_qa import SCIENCE_QA
from mmpeft_fast.data.sets.vizwiz import VIZWIZ
from mmpeft_fast.data.sets.vqav2 import VQAV2

__all__ = ["EASY_VQA_SETS", "SETS", "BadRecords", "DataSet", "TaskSample", "decodable", "fitting", "load_set"]

SETS: dict[str, DataSet] = {
    each.name: each
    for each in (
        SCIENCE_QA,
        VIZWIZ,
        ICONQA_TXT,
        ICONQA_BLANK,
        FLICKR30K,
        OKVQA,
        OCR_VQA,
        VQAV2,
        POPE,
        LLAVA,
    )
}
