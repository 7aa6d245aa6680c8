package.path = "@DIR@/?.lua;" .. package.path -- written by rms slurm-config
local rms = require("rms")
function slurm_job_submit(job, parts, uid) return rms.submit(job, parts, uid) end
function slurm_job_modify(job, record, parts, uid) return rms.modify(job, record, parts, uid) end
return slurm.SUCCESS
