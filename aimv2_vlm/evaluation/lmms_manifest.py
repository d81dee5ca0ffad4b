"""Entry point `lmms_eval.models`, read at lmms-eval's start: nothing heavy, for a fault here hides other plug-ins."""


def manifest():
    """Registers the model as `aimv2_vlm`; torch and transformers load only when the model is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("aimv2_vlm", simple_class_path="aimv2_vlm.evaluation.lmms_model.AssistantModel")
