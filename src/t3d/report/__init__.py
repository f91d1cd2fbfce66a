from t3d.report.config import ReportConfig
from t3d.report.html import write_report
from t3d.report.terminal import show

__all__ = ["ReportConfig", "show", "write_report"]
