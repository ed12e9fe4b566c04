"""Modules of A1111's ControlNet extension that nothing here stands for: why not, and what to use instead."""

_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("reference_",), "makes no hint: there it takes the style of a picture by the base's own attention. No control "
                      "here does that. The nearest is the annotator shuffle with a control of shuffle"),
    (("ip-adapter", "ip_adapter", "instant_id", "pulid", "facexlib"),
     "makes no hint: it describes a picture, or a face, to an adapter that is no ControlNet. Such adapters are not "
     "read here"),
    (("clip_vision", "t2ia_style", "revision_", "clip-vit", "clip-g"),
     "makes no hint: it describes a picture in CLIP's words to an adapter of styles. Such adapters are not read here"),
    (("inpaint_only+lama",), "fills the hole by another network (LaMa) before sampling, which is not done here: use "
                             "inpaint_only"),
    (("depth_leres", "depth_hand_refiner"), "is not made here: use depth_anything_v2, depth_zoe or depth_midas"),
    (("normal_dsine",), "is not made here: use normal_bae, normal_midas or normal_depth_anything"),
    (("softedge_teed", "softedge_anyline", "te_hed"), "is not made here: use hed, pidi or softedge"),
    (("lineart_anime_denoise",), "is not made here: use lineart_anime"),
    (("densepose", "animal_openpose"), "is not made here: of people there are openpose_body, openpose_full, dwpose, "
                                       "vitpose and mediapipe_pose"),
    (("seg_ofcoco", "oneformer_coco", "seg_anime_face", "anime_face_segment", "mobile_sam"),
     "is not made here: use oneformer_ade20k or upernet_ade20k, in ADE20K's colours"),
)  # fmt: skip
"""How names begin, and a sentence about them without its subject; the first that fits holds."""


def why_not(name: str) -> str:
    """A sentence on why there is no annotator of a name that A1111's extension knows; "" for any other name.

    Names of annotators that are here must be looked up before.
    """
    plain = name.strip().lower()
    reason = next((words for starts, words in _REASONS if plain.startswith(starts)), "")
    return f'"{name}" {reason}.' if reason else ""
