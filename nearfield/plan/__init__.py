"""What local attention costs before it runs, and which pattern each site should get. No tensors."""

from nearfield.plan.pattern import GroupPlan, SitePlan, plan_from_json, plan_to_json

__all__ = ["GroupPlan", "SitePlan", "plan_from_json", "plan_to_json"]
