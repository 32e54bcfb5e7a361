"""Models in dwi_ml's own files, read and written."""

from dwiml_func.dwi_ml.models import DwiMlModel, read_dwi_ml_model, write_dwi_ml_model

__all__ = ["DwiMlModel", "read_dwi_ml_model", "write_dwi_ml_model"]
