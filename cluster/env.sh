# The environment of every Ray process of a NeuroSTORM cluster: sourced on each node before `ray start`.
# No secret is in here: the token itself comes from ~/.ray/auth_token, RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN.
export RAY_AUTH_MODE=token                     # who has no token can neither submit a job nor read the dashboard
export RAY_USAGE_STATS_ENABLED=0               # nothing is reported to anyone
export RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2   # a lost worker is noticed, and a checkpoint registered, at once
export OMP_WAIT_POLICY=PASSIVE                 # waiting threads sleep: spinning ones slow their neighbours down
export MLFLOW_DISABLE_TELEMETRY=true
