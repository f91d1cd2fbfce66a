from t3d.report.config import ReportConfig

__all__ = ["ReportConfig"]
