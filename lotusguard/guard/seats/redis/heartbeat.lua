-- SPDX-License-Identifier: Apache-2.0
-- A guard says that it is alive, and asks whether this data set is complete.
-- KEYS: the guards by the time they were last seen; the record of the data set: the epoch of its server, its generation,
-- when a guard first saw it, and for each guard of the last seconds whether it has given back its holds.
-- ARGV[1]: JSON {epoch, generation, proposed, guard, seen = guards that this one knows of, given_back, fresh, longest}.
-- The answer is JSON {generation, complete, guards}.

local request = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local guards, record = KEYS[1], KEYS[2]

if redis.call('HGET', record, 'epoch') ~= request.epoch then
  -- another server, an older data set, or everything was deleted: what this guard proposes becomes the generation
  redis.call('DEL', record)
  redis.call('HSET', record, 'epoch', request.epoch, 'began', string.format('%.6f', now))
  -- a server that has just been started: nobody knows which guards used the one before
  if request.fresh then redis.call('HSET', record, 'missing:', '1') end
  for _, guard in ipairs(redis.call('ZRANGEBYSCORE', guards, now - GUARD_SEEN, '+inf')) do
    redis.call('HSET', record, 'missing:' .. guard, '1')
  end
end
redis.call('HSETNX', record, 'generation', request.proposed)
local generation = redis.call('HGET', record, 'generation')
local gave = request.given_back and request.generation == generation
local began = tonumber(redis.call('HGET', record, 'began'))
local over = now - began >= request.longest or now < began  -- the clock may have been set back

if not over then
  for _, guard in ipairs(request.seen) do
    if redis.call('HEXISTS', record, 'given:' .. guard) == 0 then
      redis.call('HSET', record, 'missing:' .. guard, '1')
    end
  end
  if gave then
    redis.call('HSET', record, 'given:' .. request.guard, '1')
    redis.call('HDEL', record, 'missing:' .. request.guard)
  end
end
local complete, spent = over, {}
if not over and gave then complete = true end
if over or gave then
  for _, name in ipairs(redis.call('HKEYS', record)) do
    if string.sub(name, 1, 8) == 'missing:' then
      if not over then complete = false end
      spent[#spent + 1] = name
    elseif string.sub(name, 1, 6) == 'given:' then
      spent[#spent + 1] = name
    end
  end
end
-- nobody is waited for any more: the names of guards that came and went are dropped
if over and #spent > 0 then redis.call('HDEL', record, unpack(spent)) end

redis.call('ZADD', guards, now, request.guard)
redis.call('ZREMRANGEBYSCORE', guards, '-inf', now - GUARD_SEEN)
redis.call('ZREMRANGEBYSCORE', guards, now + GUARD_SEEN, '+inf')
redis.call('EXPIRE', guards, GUARDS_KEPT)
redis.call('EXPIRE', record, RECORD_KEPT)
return cjson.encode({generation, complete, redis.call('ZRANGE', guards, 0, -1)})
