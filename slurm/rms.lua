-- RMS inside slurmctld: checks a MIG request when a job is submitted, and guards it afterwards. A site's own
-- job_submit.lua calls submit() and modify(); the job_submit.lua beside this file is an example. For Lua 5.1 (Slurm
-- 22.05) to 5.4. What the user typed, say --gres=mig:3g, becomes
--   * counts that slurmctld itself adds up:  gres:mig:3g.40gb:1,gres:migc:3,gres:migm:4  (compute and memory slices)
--   * a word to the node, in the comment:    rms1:3g.40gb:1;s=<submit epoch>;l=<limit minutes>;<user's own comment>
-- The comment is the one field that slurmd hands to the Prolog, inside the signed credential: nobody may forge it.
--
--   * where nodes publish what fits (rms_table.lua: admission), the name of the request in the job's constraint, and a
--     share of the token:  --constraint=rms_3g.40gb_1  gres:migt:job:1,gres:migt:size:6,gres:migt:open:1
--
-- All this runs under slurmctld's locks: no files, no processes, no waiting. And no assignment to job.extra but in mode
-- `extra`, which needs 23.11: slurmctld 22.05 frees it twice and aborts when the job is purged.

local M = {}

local PREFIX = "rms1:"
local MAX_BYTES = 1024 -- of a comment or a gres string; slurmctld checks the same after us, but says no clear word
local MAX_COUNT = 999
local MAX_LIMIT = 999999999 -- minutes; beyond are only the marks for "not given" and "unlimited"
local NOT_GIVEN = 4294967294 -- what slurmctld shows for a number that the user did not give
local TRES = { "tres_per_node", "tres_per_job", "tres_per_socket", "tres_per_task" }
local COUNTED = { migc = true, migm = true, migt = true }
local PUBLISHED = "rms_" -- how the names begin that nodes publish for what fits
local WHOLE_GPU = { gpu = true, shard = true, mps = true }

local site -- the generated table rms_table.lua; nil without a usable one

---------------------------------------------------------------------------------------------------------------------
-- What an empty node can hold. A board's `fit` lists the most that one empty GPU holds, as counts in the order of its
-- profiles. A request fits if it can be shared out so that no GPU gets more than one line of `fit`. Sums of slices
-- would not do: 3g+3g+1g has seven compute slices, but after the two 3g no memory slice is left.

local function dot(weights, counts)
    local sum = 0
    for i = 1, #weights do
        sum = sum + weights[i] * counts[i]
    end
    return sum
end

local function most(weights, fit)
    local cap = 0
    for _, counts in ipairs(fit) do
        cap = math.max(cap, dot(weights, counts))
    end
    return cap
end

-- Inequalities that hold for whatever is on one GPU: a weight for each profile and a cap, such as memory slices
-- (1 1 2 2 4 4 8, cap 8) or pairs of them, each weight then raised as far as the cap allows. They make the search
-- quick: for 16 GPUs 330 ms were seen without them, and at most 9 ms with them. An A100 has seven.
local function find_limits(profiles, fit)
    local found, seen = {}, {}
    local function add(weights, first)
        local cap = most(weights, fit)
        local function raise(i)
            repeat
                weights[i] = weights[i] + 1
            until weights[i] > cap or most(weights, fit) > cap
            weights[i] = weights[i] - 1
        end
        raise(first)
        for i = #weights, 1, -1 do
            raise(i)
        end
        local key = table.concat(weights, " ")
        if not seen[key] then
            seen[key] = true
            found[#found + 1] = { weights = weights, cap = cap }
        end
    end
    for _, size in ipairs({ "compute", "memory" }) do
        local largest = 1
        for _, profile in ipairs(profiles) do
            largest = math.max(largest, profile[size])
        end
        for divisor = 1, largest do
            for first = 1, #profiles do
                local weights = {}
                for i, profile in ipairs(profiles) do
                    weights[i] = math.floor(profile[size] / divisor)
                end
                add(weights, first)
            end
        end
    end
    return found
end

local function obeys_limits(board, need, gpus)
    for _, limit in ipairs(board.limits) do
        if dot(limit.weights, need) > limit.cap * gpus then
            return false
        end
    end
    return true
end

-- Exact: fills GPU after GPU, each with the largest profile still needed, trying every line of `fit` that has it.
-- need: counts in the order of the board's profiles.
local function fits(board, need, gpus)
    local too_few = {} -- by need: so many GPUs were found not to be enough
    local function search(need, gpus)
        local largest = #need
        while largest > 0 and need[largest] == 0 do
            largest = largest - 1
        end
        if largest == 0 then
            return true
        end
        local key = table.concat(need, " ")
        if gpus <= (too_few[key] or 0) or not obeys_limits(board, need, gpus) then
            return false
        end
        for _, counts in ipairs(board.fit) do
            if counts[largest] > 0 then
                local rest = {}
                for i = 1, #need do
                    rest[i] = math.max(need[i] - counts[i], 0)
                end
                if search(rest, gpus - 1) then
                    return true
                end
            end
        end
        too_few[key] = gpus
        return false
    end
    return search(need, gpus)
end

---------------------------------------------------------------------------------------------------------------------
-- Reading the request. The functions below return a problem, one line for the user, where there is one.

local function starts(text, beginning)
    return text ~= nil and text:sub(1, #beginning) == beginning
end

local function mentions_mig(job) -- or migraine: read_request knows
    for _, field in ipairs(TRES) do
        if (job[field] or ""):lower():find("mig", 1, true) then
            return true
        end
    end
    return false
end

local function shown(text) -- the user's words in a message: they also go to slurmctld's log
    return "'" .. text:sub(1, 60):gsub("[%c\127-\255]", "?") .. "'"
end

local function known_profiles()
    local names = {}
    for _, board in ipairs(site.boards) do
        for _, profile in ipairs(board.profiles) do
            names[#names + 1] = profile.name
        end
    end
    return table.concat(names, " ")
end

-- "3g:2", what follows mig: in an item -> the profile's name and the count, or nil and the problem
local function read_spec(spec)
    local word, count, more = spec:match("^([^:=]*)[:=]?([^:=]*)(.*)$")
    local profile = site.alias[word]
    if not profile and (word == "" or count == "" and word:match("^[+-]?%d*[kmtp]?$")) then -- Slurm would take any
        return nil, "say which profile, as in --gres=mig:PROFILE:COUNT; known: " .. known_profiles()
    elseif site.several[word] then
        return nil, ("%s may be %s here; say which"):format(word, site.several[word])
    elseif not profile then
        return nil, "unknown profile " .. shown(word) .. "; known: " .. known_profiles()
    elseif count == "" and more == "" then
        return profile, 1
    end
    local number = more == "" and count:match("^%d+$") and tonumber(count)
    if not number or number < 1 or number > MAX_COUNT then
        local text = "the count of %s is %s; it must be a whole number from 1 to %d"
        return nil, text:format(profile, shown(count .. more), MAX_COUNT)
    end
    return profile, number
end

-- The board whose profiles a request names, and what it needs: counts in the order of that board's profiles. nil where no
-- board has all of them.
local function place(request)
    for _, board in ipairs(site.boards) do
        local need, found = {}, 0
        for i, profile in ipairs(board.profiles) do
            need[i] = request.counts[profile.name] or 0
            found = found + (need[i] > 0 and 1 or 0)
        end
        if found == #request.order then
            return board, need
        end
    end
end

-- What the job asks for, or nil where it asks for no MIG, or nil and the problem. The request: order (names as first
-- seen), counts (by name), form (what an item begins with), others (items that are none of ours, as they were), short
-- (whether an item was not yet in the full form).
local function read_request(job)
    if not mentions_mig(job) then
        return nil
    end
    local request, whole_gpu = { order = {}, counts = {}, others = {} }, nil
    for _, field in ipairs(TRES) do
        local text = job[field] or ""
        if #text > MAX_BYTES then
            return nil, ("the gres request is longer than %d bytes"):format(MAX_BYTES)
        end
        for item in text:gmatch("[^,]+") do
            -- "gres:mig:3g.40gb:1", in newer releases "gres/mig:..."; slurmctld 22.05 takes what follows the first
            -- "gres:" wherever that stands in the item, so xgres:mig:... is ours, too
            local word = item:lower():gsub("%s", "")
            local form, rest = word:match("^.-(gres[:/])(.*)$")
            local name, spec = (rest or word):match("^([^:=]*)[:=]?(.*)$")
            if COUNTED[name] then
                return nil, "gres migc, migm and migt are counted by the system; ask with --gres=mig:PROFILE:COUNT"
            elseif name == "mig" then
                if field ~= "tres_per_node" then
                    return nil, "mig can only be asked for by node; use --gres=mig:PROFILE:COUNT"
                elseif not site then
                    return nil, "no mig now: rms_table.lua is missing or broken; please tell the administrators"
                end
                local profile, count = read_spec(spec)
                if not profile then
                    return nil, count
                end
                if not request.counts[profile] then
                    table.insert(request.order, profile)
                end
                request.counts[profile] = (request.counts[profile] or 0) + count
                request.form = request.form or form or ""
                request.short = request.short or item ~= ("%smig:%s:%d"):format(form or "", profile, count)
            elseif name ~= "" then -- nothing after a comma
                whole_gpu = WHOLE_GPU[name] and name or whole_gpu
                if field == "tres_per_node" then
                    table.insert(request.others, item)
                end
            end
        end
    end
    if not request.form then
        return nil
    elseif whole_gpu then
        return nil, ("mig and %s can't be asked for in one job"):format(whole_gpu)
    end
    return request
end

---------------------------------------------------------------------------------------------------------------------
-- The two calls.

-- The user's own part of a comment: all that looks like our prefix is taken off (it may be copied from an old job).
local function own_part(comment)
    local from = 1
    while comment:find("^" .. PREFIX, from) do
        local _, last = comment:find("^" .. PREFIX .. "[^;]*;s=%d*;l=%d*;", from)
        from = (last or from + #PREFIX - 1) + 1
    end
    return comment:sub(from)
end

-- Where slurmctld is told what fits (a board's gates): the name of a request that fits, which the job must find published
-- on its node. What has no name of its own waits for one that is surely enough: that of the table for small mixes, the
-- next larger count of its profile, or as many whole GPUs as it needs. A small one that runs for a short time only has a
-- name that is published, too, while what is kept for a large job is not needed yet. `limit` is in minutes, 0 for none.
local function gate(board, need, limit)
    local words, first, count = {}, nil, 0
    for i, profile in ipairs(board.profiles) do
        if need[i] > 0 then
            words[#words + 1] = ("%s:%d"):format(profile.name, need[i])
            first, count = profile.name, need[i]
        end
    end
    local typed = table.concat(words, ",")
    if board.short[typed] and limit > 0 and limit <= site.short_minutes then
        return board.short[typed]
    elseif board.gates[typed] then
        return board.gates[typed]
    elseif #words == 1 then
        for larger = count, MAX_COUNT do
            if board.gates[first .. ":" .. larger] then
                return board.gates[first .. ":" .. larger]
            end
        end
    end
    local gpus = 1
    while not fits(board, need, gpus) do
        gpus = gpus + 1
    end
    return board.gates[board.whole .. ":" .. gpus]
end

-- A job's share of the token: never more is free on a node than jobs of which it is proven that all will fit.
local function share(board, need)
    local size, instances = 0, 0
    for i, profile in ipairs(board.profiles) do
        instances = instances + need[i]
        size = need[i] > 0 and profile.weight or size
    end
    return instances == 1 and size or board.span
end

local function mentions_published(text) -- or farms_: not at the beginning of a word
    return text ~= nil and (" " .. text):find("[^%w_.+-]" .. PUBLISHED) ~= nil
end

-- The user's own constraint and ours. Slurm reads from the left and knows one level of parentheses.
local function both(own, name)
    if own == nil or own == "" then
        return name
    elseif not own:gsub("%b()", ""):gsub("%b[]", ""):find("|", 1, true) then
        return own .. "&" .. name
    elseif not own:find("[%(%[]") then
        return "(" .. own .. ")&" .. name
    end
    return nil, "this --constraint can't be combined with mig: put all of what is joined with | into parentheses"
end

-- What users may not ask for: what nodes publish, and the node that is never there.
local function reserved(job, record)
    if not (site and site.sentinel) then
        return nil
    end
    for _, field in ipairs({ "features", "prefer", "extra" }) do
        if mentions_published(job[field]) and not (record and job[field] == record[field]) then
            return "what begins with " .. PUBLISHED .. " is set by the system; ask with --gres=mig:PROFILE:COUNT"
        end
    end
    if (" " .. (job.req_nodes or "")):find("[^%w_.-]" .. site.sentinel) then
        return "node " .. site.sentinel .. " takes no jobs"
    end
end

-- Whether a job may preempt others, by its partitions or its QOS. What it would have room for then is not published
-- before: slurmctld would never preempt for it.
local function preempts(job)
    for name in ((job.partition or "") .. "," .. (job.qos or "")):gmatch("[^,]+") do
        if site.preempting[name] then
            return true
        end
    end
end

-- A time limit as it stands in the comment; 0 for none.
local function minutes(limit)
    return limit and limit <= MAX_LIMIT and limit or 0
end

-- The limit of a job whose user gave none is its partition's, and here the longest of several (a,b); 0 where one has
-- none. `names` is nil for the default partition; `parts` are those that slurmctld knows. A job that comes from a
-- partition without DefaultTime gets none here either (22.05).
local function of_partitions(names, parts, comes)
    local longest = 0
    for name, part in pairs(parts or {}) do
        local named = names and ("," .. names .. ","):find("," .. name .. ",", 1, true)
        if named or not names and part.flag_default == 1 then
            local limit = (comes or part.default_time == NOT_GIVEN) and part.max_time or part.default_time
            if minutes(limit) == 0 then
                return 0
            end
            longest = math.max(longest, limit)
        end
    end
    return longest
end

-- The fields of a job by which slurmctld lets it in only where it fits, and the problem where there is one.
local function admit(job, board, need, limit)
    local fields = {}
    if not board.gates or preempts(job) then
        return fields
    end
    local name, problem = gate(board, need, limit)
    if site.admission == "extra" then
        if job.extra and job.extra ~= "" then
            problem = "--extra can't be used with mig"
        end
        fields.extra = name .. ">=1"
    elseif job.prefer and job.prefer ~= "" then
        problem = "--prefer can't be used with mig: it would replace the constraint that asks whether it fits"
    elseif (job.req_nodes or "") == "" and (job.reservation or "") == "" then
        fields.features, problem = both(job.features, name)
    end -- a job for certain nodes would be refused while these have no room: it goes without, and may be sent back
    return fields, problem
end

local function check_submit(job, _, parts)
    local comment = job.comment or ""
    if starts(comment, PREFIX) and #comment > MAX_BYTES then -- slurmctld would refuse it, too; own_part would take long
        return ("the comment is %d bytes too long (at most %d)"):format(#comment - MAX_BYTES, MAX_BYTES)
    end
    local own = own_part(comment)
    local request, problem = read_request(job)
    problem = problem or reserved(job)
    if not request or problem then
        if own ~= comment and not problem then
            job.comment = own
        end
        return problem
    end

    local board, need = place(request)
    if not board then
        return table.concat(request.order, " and ") .. " are profiles of different GPUs; a job with mig runs on one node"
    end
    local compute, memory = 0, 0
    for i, profile in ipairs(board.profiles) do
        compute, memory = compute + need[i] * profile.compute, memory + need[i] * profile.memory
    end
    local words, gres = {}, request.others
    for i, name in ipairs(request.order) do
        words[i] = ("%s:%d"):format(name, request.counts[name]) -- the count always: to slurmctld, 3g alone is a number
        table.insert(gres, request.form .. "mig:" .. words[i])
    end
    table.insert(gres, ("%smigc:%d"):format(request.form, compute))
    table.insert(gres, ("%smigm:%d"):format(request.form, memory))
    if board.gates then
        table.insert(gres, ("%smigt:job:1"):format(request.form))
        table.insert(gres, ("%smigt:size:%d"):format(request.form, share(board, need)))
        table.insert(gres, ("%smigt:open:1"):format(request.form))
    end

    if not fits(board, need, board.gpus) then
        local text = "%s is more than an empty node can place (%d x %s)"
        return text:format(table.concat(words, ","), board.gpus, board.model)
    elseif job.min_nodes and job.min_nodes ~= NOT_GIVEN and job.min_nodes > 1 then
        return "a job with mig runs on one node; this one asks for more (-N, -w or tasks per node)"
    elseif request.short and (job.argc or 0) > 0 and not job.script and job.name ~= "interactive" then
        -- srun, which asks for its step by itself, with what the user typed: that would fail once the job has started.
        -- In 26.05 salloc tells its command, too, but calls its jobs interactive.
        return "srun needs the full form, --gres=mig:" .. table.concat(words, ",mig:")
    end
    local limit = job.time_limit
    limit = (limit == nil or limit == NOT_GIVEN) and of_partitions(job.partition, parts) or minutes(limit)
    local fields, obstacle = admit(job, board, need, limit)
    if obstacle then
        return obstacle
    end
    local prefix = ("%s%s;s=%d;l=%d;"):format(PREFIX, table.concat(words, ","), os.time(), limit)
    local excess = #prefix + #own - MAX_BYTES
    if excess > 0 then
        return ("the comment is %d bytes too long (at most %d beside mig)"):format(excess, MAX_BYTES - #prefix)
    end
    job.tres_per_node = table.concat(gres, ",")
    job.comment = prefix .. own
    job.min_nodes = 1
    job.max_nodes = 1
    for field, value in pairs(fields) do
        job[field] = value
    end
end

-- One change of all tasks of an array, or all components of a heterogeneous job, is shown to us once for each, in one
-- and the same table, with what we wrote for the one before. So we remember that, by field, and what was typed there.
local written = {}

local function write(job, field, value)
    local was, typed = written[field], job[field]
    if was and typed == was.value then
        typed = was.typed
    end
    written[field] = { value = value, typed = typed }
    job[field] = value
end

local function take_back(job, record)
    for field, was in pairs(written) do
        if job[field] == was.value then
            was.value = was.typed or record[field] or "" -- empty: as it is
            job[field] = was.value
        end
    end
end

-- A waiting job whose limit is raised has not got the name of a short one any more.
local function outgrow(job, record, limit)
    if not (site and site.sentinel) or record.job_state % 256 ~= 0 or limit > 0 and limit <= site.short_minutes then
        return
    end
    local field, ending = "features", ""
    if site.admission == "extra" then
        field, ending = "extra", ">=1"
    end
    local own, name = (record[field] or ""):match("^(.-)(" .. PUBLISHED .. "[^&]*)_short" .. ending .. "$")
    if name and (own == "" or own:sub(-1) == "&") then
        write(job, field, own .. name .. ending)
    end
end

-- What of a comment is ours.
local function beginning(comment)
    return comment:match("^" .. PREFIX .. "[^;]*;s=%d+;l=%d+;") or comment
end

-- Whoever changes a job, an administrator included: what the node goes by stays true, and the job can start.
local function check_change(job, record, parts)
    if not starts(record.comment, PREFIX) then
        return
    end
    local elsewhere = (job.req_nodes or "") ~= "" or (job.reservation or "") ~= ""
    if elsewhere and (job.features or record.features) == record.features and mentions_published(record.features) then
        -- While no such node has room slurmctld would hold it, for ever: BadConstraints. Lua can't empty the constraint.
        return "a job with mig can't be bound to nodes or a reservation later; submit a new one"
    end
    if job.comment and not starts(job.comment, PREFIX) and not job.tres_per_node then
        write(job, "comment", beginning(record.comment) .. job.comment)
    end
    local limit = job.time_limit and job.time_limit ~= NOT_GIVEN and minutes(job.time_limit)
    if not limit and job.partition and record.time_limit == NOT_GIVEN then
        limit = of_partitions(job.partition, parts, true)
    end
    if limit then -- the node goes by the comment
        local fixed, own = (job.comment or record.comment):match("^(" .. PREFIX .. "[^;]*;s=%d+;l=)%d+;(.*)$")
        if fixed then
            write(job, "comment", ("%s%d;%s"):format(fixed, limit, own))
        end
        outgrow(job, record, limit)
    end
end

local function check_modify(job, record, parts)
    if not starts(record.comment, PREFIX) then
        if starts(job.comment, PREFIX) then
            return "a comment can't begin with " .. PREFIX
        end
        local request, problem = read_request(job)
        problem = problem or reserved(job)
        return problem or request and "mig can't be added to a submitted job; submit a new one"
    end
    for _, field in ipairs(TRES) do
        if job[field] then
            return "the gres of a job with mig can't be changed; submit a new one"
        end
    end
    if site and site.sentinel then
        for _, field in ipairs({ "features", "prefer", "extra" }) do
            if job[field] and job[field] ~= record[field] then
                return "the constraint of a job with mig can't be changed; submit a new one"
            end
        end
        local problem = reserved(job, record)
        if problem then
            return problem
        end
    end
    for _, field in ipairs({ "min_nodes", "max_nodes" }) do
        if job[field] and job[field] ~= NOT_GIVEN and job[field] ~= 1 then
            return "a job with mig stays on one node"
        end
    end
    if job.comment and not starts(job.comment, beginning(record.comment)) then
        return "the comment of a job with mig must keep its beginning, " .. beginning(record.comment)
    end
    return check_change(job, record, parts)
end

-- Runs a check and answers slurmctld. An error that reached slurmctld would be a yes (seen in 22.05); so if we fail
-- ourselves, we refuse, but only what has to do with mig, and nothing of root's: the hooks are that.
local function answer(uid, check, job, record, parts)
    local ok, problem = pcall(check, job, record, parts)
    if not ok then
        slurm.log_error("rms: internal error: %s", tostring(problem))
        local ours = mentions_mig(job) or starts(job.comment, PREFIX) or record and starts(record.comment, PREFIX)
        problem = ours and (uid ~= 0 or not record) and "internal error, see slurmctld's log; please tell the administrators"
    end
    if not problem then
        return slurm.SUCCESS
    end
    slurm.log_user("%s", "rms: " .. problem)
    return slurm.ERROR, problem
end

function M.submit(job, parts, uid)
    return (answer(uid, check_submit, job, nil, parts))
end

function M.modify(job, record, parts, uid)
    take_back(job, record)
    local rc, problem = answer(uid, uid == 0 and check_change or check_modify, job, record, parts)
    if problem then -- before 23.02 scontrol prints only "Unspecified error", so at least the log knows
        slurm.log_info("rms: refused uid %d a change of job %s: %s", uid, tostring(record.job_id), problem)
    end
    return rc
end

local function load_site()
    local loaded = require("rms_table")
    assert(type(loaded) == "table" and loaded.boards and loaded.alias and loaded.several, "not a table of ours")
    for _, board in ipairs(loaded.boards) do
        board.limits = find_limits(board.profiles, board.fit)
    end
    return loaded
end

local ok, loaded = pcall(load_site)
if ok then
    site = loaded
else
    slurm.log_error("rms: rms_table.lua can't be used, so jobs with mig will be refused: %s", tostring(loaded))
end

return M
